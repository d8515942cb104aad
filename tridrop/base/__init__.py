"""What all of tridrop stands on and knows nothing of masks: tensors' memory and strides, checks of
plain arguments, files, and what is private of torch."""
