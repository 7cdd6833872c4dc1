"""The protocol engine: one packet in, datagrams or a reason out.  Sans I/O: no socket, clock, file or global.

A packet's way out is :mod:`outbound`, its way in :mod:`inbound`; :mod:`emit` is what both fill, :mod:`tables` what both
consult, :mod:`outbound_sa`, :mod:`outbound_esp` and :mod:`inbound_sa` an SA made ready for packets.
"""
