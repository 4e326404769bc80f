// The handler of SIGSYS: the kernel runs it on the thread whose system call a filter has refused. It writes one line of log
// and lets the process die of SIGSYS. It calls nobody, allocates nothing and takes no lock, so it works whatever the thread
// was doing, with or without the interpreter's lock. It never returns.
//
//   2026-03-01T09:30:12.123456789: [4711][4713][seccomp]:ERROR: system call execve (221) is not allowed on a vCPU thread;
//   arguments 0x7f0000001000, 0x0, 0x0; the process ends
//
// Assembled by sandbox/generate.py, kept as bytes in sandbox/tables_aarch64.py. DATA is where sandbox/kernel.py has put:
//
//   0    u32  descriptor of the log
//   4    u32  how many names follow
//   8    four names of kinds of threads, of 24 bytes, padded with zeroes
//   104  names of system calls by number, each with a zero behind it
//
// A filter's SECCOMP_RET_DATA arrives as si_errno: the kind of the thread, plus 16 when the call would be allowed with
// other arguments.
//
// Entry: x1 siginfo_t (4 si_errno, 24 si_syscall), x2 ucontext_t (184 x0, 192 x1, 200 x2 of the thread).
// Registers: x19 DATA, x20 siginfo_t, x21 ucontext_t, x22 scratch of 1 KiB on the stack (0 a timespec, 16 a pollfd, 24 the
// timespec of ppoll, 64 the line, digits end at 1024), x23 where the next letter goes. Subroutines use x0 to x8.

        .macro  quotient to, number, divisor    // x9 is the divisor afterwards
        ldr     w9, =\divisor
        udiv    \to, \number, x9
        .endm
        .macro  call number
        mov     x8, \number
        svc     0
        .endm
        .macro  letter character
        mov     w0, \character
        strb    w0, [x23], 1
        .endm
        .macro  say words
        adr     x0, \words
        bl      text
        .endm
        .macro  two number
        mov     x0, \number
        mov     w1, 2
        bl      decimal
        .endm

        .text
handler:
        mov     x20, x1
        mov     x21, x2
        ldr     x19, data
        sub     sp, sp, 1024
        mov     x22, sp
        add     x23, x22, 64

clock:  mov     x0, 0                           // clock_gettime(CLOCK_REALTIME, scratch)
        mov     x1, x22
        call    113

        // The date of a day, counted from 1 March of the year 0: every 400 years have 146097 days, and the months from March
        // on have 153 days in each five.
        ldr     x0, [x22]
        quotient x10, x0, 86400
        msub    x24, x10, x9, x0                // seconds of the day
        ldr     w0, =719468
        add     x10, x10, x0                    // days since 1 March 0
        quotient x11, x10, 146097
        msub    x12, x11, x9, x10               // day of the era
        mov     x13, x12                        // year of the era = (day - day/1460 + day/36524 - day/146096) / 365
        quotient x0, x12, 1460
        sub     x13, x13, x0
        quotient x0, x12, 36524
        add     x13, x13, x0
        quotient x0, x12, 146096
        sub     x13, x13, x0
        quotient x13, x13, 365
        mov     x0, 400
        madd    x25, x11, x0, x13               // the year, if it began in March
        msub    x12, x13, x9, x12               // day of the year = day - (365*year + year/4 - year/100)
        sub     x12, x12, x13, lsr 2
        quotient x0, x13, 100
        add     x12, x12, x0
        add     x0, x12, x12, lsl 2             // month from March = (5*day + 2) / 153
        add     x0, x0, 2
        quotient x26, x0, 153
        mov     x0, 2                           // day of the month = day - (153*month + 2)/5 + 1
        madd    x0, x26, x9, x0
        quotient x0, x0, 5
        sub     x27, x12, x0
        add     x27, x27, 1
        add     x26, x26, 3
        cmp     x26, 12
        b.ls    1f
        sub     x26, x26, 12
        add     x25, x25, 1
1:      mov     x0, x25
        mov     w1, 4
        bl      decimal
        letter  '-'
        two     x26
        letter  '-'
        two     x27
        letter  'T'
        quotient x10, x24, 3600
        msub    x24, x10, x9, x24
        two     x10
        letter  ':'
        quotient x10, x24, 60
        msub    x24, x10, x9, x24
        two     x10
        letter  ':'
        two     x24
        letter  '.'
        ldr     x0, [x22, 8]
        mov     w1, 9
        bl      decimal

        say     open                            // process and thread
        call    172                             // getpid
        bl      plain
        say     between
        call    178                             // gettid
        bl      plain
        say     what

        ldr     w24, [x20, 24]                  // the call: its name if there is one, and its number
        ldr     w0, [x19, 4]
        cmp     w24, w0
        b.hs    4f
        add     x0, x19, 104
        mov     w1, w24
        cbz     w1, 3f
2:      ldrb    w2, [x0], 1                     // one name further
        cbnz    w2, 2b
        subs    w1, w1, 1
        b.ne    2b
3:      ldrb    w2, [x0]
        cbz     w2, 4f
        bl      text
        letter  ' '
4:      letter  '('
        mov     w0, w24
        bl      plain
        ldr     w24, [x20, 4]
        adr     x0, refused
        adr     x1, arguments
        tst     w24, 16
        csel    x0, x0, x1, eq
        bl      text
        and     w24, w24, 3
        mov     w0, 24
        madd    w24, w24, w0, wzr
        add     x0, x19, 8
        add     x0, x0, x24
        bl      text
        say     values
        ldr     x0, [x21, 184]
        bl      hex
        say     comma
        ldr     x0, [x21, 192]
        bl      hex
        say     comma
        ldr     x0, [x21, 200]
        bl      hex
        say     end

        ldr     w0, [x19]                       // ppoll({log, POLLOUT}, 1, 100 ms): a reader that is stuck costs the line
        mov     w1, 4
        stp     w0, w1, [x22, 16]
        ldr     x1, =100000000
        stp     xzr, x1, [x22, 24]
        add     x0, x22, 16
        mov     x1, 1
        add     x2, x22, 24
        mov     x3, 0
        call    73
        cmp     x0, 1
        b.ne    5f
        ldr     w0, [x19]                       // write(log, line, length)
        add     x1, x22, 64
        sub     x2, x23, x1
        call    64

        // A call that no filter allows. SIGSYS is blocked in here, so the kernel ends the process with it.
5:      ldr     w8, =0x3ffffffe
        svc     0
        mov     x0, 159                         // exit_group(128 + SIGSYS), if there is no filter on this thread
        call    94
        brk     0

plain:  mov     w1, 1
decimal:                                        // x0 in at least w1 digits
        mov     x2, 10
number: add     x3, x22, 1024
        mov     x4, x3
6:      udiv    x5, x0, x2
        msub    x6, x5, x2, x0
        add     w7, w6, 'a' - 10
        add     w6, w6, '0'
        cmp     w6, '9'
        csel    w6, w6, w7, ls
        strb    w6, [x3, -1]!
        sub     w1, w1, 1
        mov     x0, x5
        cbnz    x0, 6b
        cmp     w1, 0
        b.gt    6b
7:      ldrb    w0, [x3], 1
        strb    w0, [x23], 1
        cmp     x3, x4
        b.ne    7b
        ret

hex:    mov     w1, '0'
        strb    w1, [x23], 1
        mov     w1, 'x'
        strb    w1, [x23], 1
        mov     x2, 16
        mov     w1, 1
        b       number

text:   ldrb    w1, [x0], 1                     // letters up to a zero
        cbz     w1, 8f
        strb    w1, [x23], 1
        b       text
8:      ret

        .balign 8
data:   .quad   0x7469767472617473              // DATA: "startvit", patched
open:   .asciz  ": ["
between:.asciz  "]["
what:   .asciz  "][seccomp]:ERROR: system call "
refused:.asciz  ") is not allowed on "
arguments:
        .asciz  ") is not allowed with these arguments on "
values: .asciz  "; arguments "
comma:  .asciz  ", "
end:    .asciz  "; the process ends\n"
        .balign 8                               // for the constants, which come here
