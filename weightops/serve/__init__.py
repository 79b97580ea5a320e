"""Models over HTTP: OpenAI's API, the old programs' own, and a page; thin over `inference`."""
