"""The processes that train one model together, and which part of it each one has."""
