"""prometheus-client collectors, the netstat -sp report."""
