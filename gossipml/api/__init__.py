"""The local HTTP endpoint: health, predictions, the Open Inference Protocol, status, events, metrics.

`ports` says what this part needs of the daemon, `routes` what it answers, `guard` what it refuses, `http1` how
bytes become requests, `server` how it starts and stops. It imports the foundation alone.
"""
