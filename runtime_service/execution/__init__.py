"""Steps on a device: tensors in, tensors out; never learns what a request is."""
