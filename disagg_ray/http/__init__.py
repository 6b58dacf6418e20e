"""Services over HTTP: OpenAI's videos API on Ray Serve, with jobs in a database and a page in the browser.

`app` builds the ASGI application, `routes` answer, `jobs` runs what was accepted, `store` keeps it.
"""
