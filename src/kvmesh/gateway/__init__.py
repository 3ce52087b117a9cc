"""The HTTP door: REST made from the contract's annotations, the OpenAI API, and what operators probe.

It calls the servicers in process, so a REST call and a gRPC call run the same code; it decides nothing itself.
"""
