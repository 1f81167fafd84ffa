"""Plain adapters of PEFT: written, checked, made smaller, started from a plan."""
