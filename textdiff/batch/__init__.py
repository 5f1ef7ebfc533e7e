"""Files of prompts: what their lines ask for, and a file of results that outlives interruptions."""
