"""`make bench`: Tenantry beside its agent reached directly, nginx, haproxy and configurable-http-proxy, in one run."""
