"""`python -m apollo_client.command`: the `apollo` command where its script is not on PATH."""

from apollo_client.command.app import main

if __name__ == "__main__":
    main()
