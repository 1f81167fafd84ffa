"""The command line: one file per verb, thin; everything heavy is imported when a verb runs."""
