"""The other architectures of the paper's figure, and other engines that run ours."""
