"""Where a finished run's time went: tables, a timeline, a trace for Perfetto, a page."""
