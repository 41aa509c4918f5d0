"""What comes from outside, and what is shown: the few places where neither is trusted.

``reading`` makes values of JSON and YAML and refuses what no reader would agree on; ``content`` tells by its first
bytes what a file is, whatever it is called; ``patterns`` matches regular expressions that somebody else wrote in time
that none of them can make explode; ``printable`` makes names and texts safe to show on a terminal, in Markdown and in
HTML.

Nothing here knows of models or of quantization.
"""
