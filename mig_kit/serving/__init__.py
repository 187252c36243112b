"""Replies of a model or of servers, and the files that keep them."""
