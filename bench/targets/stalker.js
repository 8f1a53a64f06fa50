/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Frida's Stalker on every thread, for the blocks of the executable only: all other modules are excluded, as it is
 * quickest. `event`: compile tells of each block once, block each time it is executed.
 */
'use strict';

const executable = Process.mainModule;
const first = executable.base;
const end = first.add(executable.size);
const blocks = new Set();

rpc.exports = {
	follow(event) {
		for (const module of Process.enumerateModules())
			if (module.path !== executable.path)
				Stalker.exclude(module);
		const threads = Process.enumerateThreads();
		for (const thread of threads)
			Stalker.follow(thread.id, {
				events: { [event]: true },
				onReceive(events) {
					for (const [start] of Stalker.parse(events, { annotate: false, stringify: false }))
						if (start.compare(first) >= 0 && start.compare(end) < 0)
							blocks.add(start.toString());
				},
			});
		return threads.length;
	},
	count() {
		Stalker.flush();
		return blocks.size;
	},
};
