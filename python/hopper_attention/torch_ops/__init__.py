"""PyTorch's view: operators, autograd, DTensor."""
