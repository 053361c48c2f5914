"""What each command does, from the request to the finished folder or table."""
