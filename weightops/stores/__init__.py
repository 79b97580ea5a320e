"""Where bytes lie: folders on disk, hubs and web servers; names, identities, ranges."""
