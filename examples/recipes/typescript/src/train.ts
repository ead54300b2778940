// Teaches one sentence and prints the loss of each step: node build/train.js CONTEXT CONTINUATION [EPOCHS]
import { randomUUID } from "node:crypto";

import { ConnectError, createClient } from "@connectrpc/connect";

import { RunState, TrainingService, type RunEvent } from "./gen/apollo/v1/training_pb.js";
import { isAway, transport } from "./server.js";

const RETRY_MS = 1000;
const client = createClient(TrainingService, transport());

/** Every event of a run, none twice, also when the server is restarted meanwhile. */
async function* train(context: string, continuation: string, epochs: number): AsyncGenerator<RunEvent> {
  const sample = { content: { case: "text", value: { context, continuation } } } as const;
  const spec = { samples: [sample], epochs, optimizer: { lr: 3e-5 } };
  // With its id a call that broke can be made again: it is the same run.
  const created = await client.createRun({ requestId: randomUUID(), spec });
  const runId = created.run!.runId;
  let afterSequence = 0n;
  for (;;) {
    try {
      for await (const { event } of client.watchRun({ runId, afterSequence })) {
        afterSequence = event!.sequence;
        yield event!;
        if (event!.event.case === "finished") return;
      }
    } catch (error) {
      if (!isAway(error)) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

async function main(context: string, continuation: string, epochs: number): Promise<number> {
  for await (const { event } of train(context, continuation, epochs)) {
    if (event.case === "step") {
      console.log(`step ${event.value.step}: loss ${event.value.loss.toFixed(4)}`);
    }
    if (event.case === "finished") {
      console.log([RunState[event.value.state], event.value.failure?.message].join(" ").trim());
      return event.value.state === RunState.SUCCEEDED ? 0 : 1;
    }
  }
  return 1;
}

const [context, continuation, epochs = "10"] = process.argv.slice(2);
if (context === undefined || continuation === undefined) {
  console.error("usage: node build/train.js CONTEXT CONTINUATION [EPOCHS]");
  process.exit(2);
}
process.exit(
  await main(context, continuation, Number(epochs)).catch((error: unknown) => {
    const { details, rawMessage } = ConnectError.from(error);
    console.error(details.length ? rawMessage : `No training server answers: ${rawMessage}`);
    return 1;
  }),
);
