"""What a search will take, found before it begins: time, money, memory, disk, and what its promises may come to."""
