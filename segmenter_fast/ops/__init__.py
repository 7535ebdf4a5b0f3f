"""One operation per file: contract, reference, kernels, public function."""
