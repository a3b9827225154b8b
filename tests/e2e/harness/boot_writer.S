# SPDX-License-Identifier: Apache-2.0
# A guest that needs no kernel: a boot sector that writes blocks of 4 KiB to the first hard disk without end, and says the
# number of each as 4 bytes on the serial port once its write has returned. Write N fills the block that blocks_of() in
# guest.py tells with N.
    .code16
    .globl _start
_start:
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    cld
next:
    incl number
    movl number, %eax
    movw $0x8000, %di
    movw $1024, %cx
    rep stosl
    imull $0x9E3779B1, number, %eax
    shrl $16, %eax
    andl $0x7ff, %eax
    shll $3, %eax           # in sectors
    movl %eax, packet + 8
    movw $0x4300, %ax       # the BIOS's extended write
    movb disk, %dl
    movw $packet, %si
    int $0x13
    jc end
    movl number, %eax
    movw $4, %cx
    movw $0x3f8, %dx
say:
    outb %al, %dx
    shrl $8, %eax
    loop say
    movb disks, %al         # to the disks in turns
    incb disk
    addb $0x80, %al
    cmpb %al, disk
    jb next
    movb $0x80, disk
    jmp next
end:
    hlt
    jmp end
    .balign 4
number:
    .long 0
packet:
    .byte 16, 0
    .word 8                 # sectors
    .word 0x8000, 0         # from there
    .quad 0                 # to this sector
disk:
    .byte 0x80
    .org 509
disks:                      # how many there are; guest.py says
    .byte 1
    .word 0xaa55
