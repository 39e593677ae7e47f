"""python -m pipeline.export"""

from pipeline.export.command import main

if __name__ == "__main__":
    raise SystemExit(main())
