"""python -m jobs.report"""

from jobs.report.command import main

if __name__ == "__main__":
    raise SystemExit(main())
