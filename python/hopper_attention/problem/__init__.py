"""What is asked: values, checks of arguments, memory."""
