/* Dispatch by a switch with a jump table, as in lighttpd's mod_webdav. The exit status is the reply. */
#define APART __attribute__((noinline))
volatile int work, readonly;
APART static int put(void) { for (int i = 0; i < 3; i++) work += i; return 20; }
APART static int get(void) { work = 1; return 10; }
APART static int erase(void) { work *= 3; return 30; }
APART static int refuse(void) { work = 9; return 45; }
APART int dispatch(int method) {
    int status;
    switch (method) {
    case 0: status = get(); work -= 2; break;
    case 1: work = 5; status = erase(); work--; break;
    case 2: status = put(); work++; break;
    case 3: status = get() + put(); break;
    case 4: work = 77; status = 50; break;
    case 6: status = erase() + get(); work = 3; break;
    default: status = refuse(); break;
    }
    work ^= 1;
    return status;
}
int main(int count, char **words) {
    readonly = count > 2;
    int method = words[1][0] - '0';
    return dispatch(method == 2 && readonly ? 99 : method);
}
