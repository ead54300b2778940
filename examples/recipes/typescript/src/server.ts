// How the training server is reached: its unix socket, or TCP with a token.
import { connect as dial } from "node:net";
import { homedir } from "node:os";
import { join } from "node:path";

import { Code, ConnectError, type Interceptor, type Transport } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

const OWN_SOCKET = `unix:${join(homedir(), ".local/state/apollo/training.sock")}`;

/** A transport to `unix:PATH`, `http://host:port` or `https://host:port`. */
export function transport(
  address = process.env.APOLLO_ADDRESS ?? OWN_SOCKET,
  token = process.env.APOLLO_TOKEN,
): Transport {
  if (!address.startsWith("unix:")) {
    return createGrpcTransport({ baseUrl: address, interceptors: token ? [bearer(token)] : [] });
  }
  const path = address.slice("unix:".length);
  return createGrpcTransport({
    baseUrl: "http://localhost",
    nodeOptions: { createConnection: () => dial(path) },
  });
}

/** Whether no server answered, or one went away: it may be back. */
export function isAway(error: unknown): boolean {
  const { code, details } = ConnectError.from(error);
  // What the server itself says has details; a broken connection comes under many codes, without.
  return code === Code.Unavailable || details.length === 0;
}

function bearer(token: string): Interceptor {
  return (next) => (request) => {
    request.header.set("authorization", `Bearer ${token}`);
    return next(request);
  };
}
