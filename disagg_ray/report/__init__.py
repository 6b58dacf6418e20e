"""Reports a finished run: tables, a timeline, a trace for Perfetto, an HTML page."""
