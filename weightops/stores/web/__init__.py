"""Reading from hubs and web servers."""
