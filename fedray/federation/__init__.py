"""How a round goes. Read `server.py` first."""
