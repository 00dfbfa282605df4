"""From files, downloads, folders and seeds to batches of tensors."""
