"""What runs on a machine: training, sampling, the report, the demo, the command line."""
