"""python -m pipeline.pack"""

from pipeline.pack.command import main

if __name__ == "__main__":
    raise SystemExit(main())
