"""Published number formats, one file each."""
