"""The nightly run: builds are made or taken as they are, measured from cheap to dear, judged, and remembered.

``settings`` is the configuration, YAML in and checked whole; ``run`` the night itself, and its verdict; ``nights`` the
folders of nights, and which old ones may go.
"""
