/* Dispatch by a table of records with a name and two functions, as in redis. The exit status is the reply. */
#include <stdio.h>
#include <string.h>
#define APART __attribute__((noinline))
volatile int work, cluster;
APART static int say(const char *text) { puts(text); return 45; }
APART static int store(const char *text) { for (int i = 0; text[i]; i++) work += i; return 0; }
static int keys(int count) { return count; }
static int first_key(int count) { return count - 1; }
static int get_command(char **words) { store(words[1]); work = 1; return 10; }
APART static int set_command(char **words) { store(words[1]); work += store("value"); return 20; }
static int append_command(char **words) {
    work = 2;
    store(words[1]);
#ifdef APPEND_SETS
    return set_command(words);
#endif
    return 21;
}
static int join_command(char **words) {
    if (!cluster) return say("ERR this instance has cluster support disabled");
    work = 3;
    return words[1] != 0;
}
static int delete_command(char **words) { work *= store(words[1]); return 30; }
static struct command {
    const char *name; long flags; int (*function)(char **); const char *summary; int (*keys)(int); long calls;
} commands[] = {
    {"append", 1, append_command, "append to a value", first_key, 0},
    {"container", 1, 0, "has no function", 0, 0},
    {"delete", 1, delete_command, "delete a key", keys, 0},
    {"get", 0, get_command, "get a value", first_key, 0},
    {"join", 0, join_command, "join the cluster", 0, 0},
    {"set", 1, set_command, "set a value", keys, 0},
};
int main(int count, char **words) {
    for (unsigned i = 0; i < sizeof commands / sizeof *commands; i++) {
        struct command *one = &commands[i];
        if (!strcmp(one->name, words[1]) && one->function) {
            one->calls += one->keys ? one->keys(count) : 0;
            return one->function(words);
        }
    }
    return say("ERR unknown command");
}
