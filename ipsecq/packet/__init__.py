"""IP datagrams as octets: views, headers, extension headers, checksums, fragments, segments, ICMP errors (sans I/O)."""
