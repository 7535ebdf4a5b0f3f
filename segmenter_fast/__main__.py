"""`python -m segmenter_fast` is `segmenter-fast`."""

from segmenter_fast.cli import main

main()
