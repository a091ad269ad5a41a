"""The wire: what requests and answers look like, and what is wrong with those that do not."""
