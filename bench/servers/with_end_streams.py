"""What `EndStreams` adds to an event: main.py without it, and FastAPI's own response with it."""

import sys
from pathlib import Path

import fastapi_streaming

sys.path.append(str(Path(__file__).parents[2]))
import main

without = main.app
del without.user_middleware[0]  # EndStreams: the last that was added stands first

streaming = fastapi_streaming.app
streaming.add_middleware(main.EndStreams)
