"""OpenAI's HTTP API: what may be asked, and how answers are written."""
