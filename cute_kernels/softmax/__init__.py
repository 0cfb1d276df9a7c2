"""The online softmax, with scores of 16-bit and of FP8 operands."""
