"""`python -m apollo_client.conformance`: the command where its script is not on PATH."""

from apollo_client.conformance.command import main

if __name__ == "__main__":
    main()
