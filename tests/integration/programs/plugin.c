/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Loads a plugin, the same source compiled with -DPLUGIN as a shared object, and unloads it. Its argument: the plugin.
 *
 *   open, close -> ok
 *   plug 3      -> feature(3), from the plugin
 *   feature 3   -> feature(3)
 */
#define _GNU_SOURCE
#include "feature.h"

#ifdef PLUGIN

NOIPA long plug(long n)
{
	return feature(n);
}

#else
#include <dlfcn.h>

int main(int count, char **arguments)
{
	char word[32];
	long number;
	void *plugin = NULL;
	long (*plug)(long) = NULL;

	say_ready();
	while (count == 2 && next_line(word, &number)) {
		if (strcmp(word, "open") == 0) {
			plugin = dlopen(arguments[1], RTLD_NOW);
			plug = plugin ? (long (*)(long))dlsym(plugin, "plug") : NULL;
			puts(plug ? "ok" : dlerror());
		} else if (strcmp(word, "close") == 0) {
			puts(dlclose(plugin) == 0 ? "ok" : dlerror());
		} else if (strcmp(word, "plug") == 0) {
			printf("%ld\n", plug(number));
		} else {
			printf("%ld\n", feature(number));
		}
	}
	return 0;
}
#endif
