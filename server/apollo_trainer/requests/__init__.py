"""From the messages of requests to what they ask for, checked field by field."""
