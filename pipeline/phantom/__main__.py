"""python -m pipeline.phantom"""

from pipeline.phantom.command import main

if __name__ == "__main__":
    raise SystemExit(main())
