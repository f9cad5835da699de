"""Rules that aggregate prompts: functions over columns of values, in the order of client ids."""
