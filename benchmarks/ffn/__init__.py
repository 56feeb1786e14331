"""One routed feed-forward beside its peers: time, memory, roofline, host overhead."""
