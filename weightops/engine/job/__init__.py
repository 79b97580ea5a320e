"""A run that many processes share: what is to be done lies in files, and so does what has been done."""
