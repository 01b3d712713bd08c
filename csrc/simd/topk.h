// What may be among the largest of a row of logits, without a sort: the entries above a threshold, side by side.
#pragma once

template <class Logit>
MUMOE_INLINE int64_t find_above(Logit logit, int64_t first, int64_t N, float threshold, Candidates& found) {
  Ints lane = iota();
  Floats poison{};
  auto visit = [&](int64_t n, auto lanes) {
    Floats x = lanes_or(logit(n, lanes), 0.0f, lanes);
    poison += x * 0.0f;
    Ints above = x > threshold;
    if (!any(above)) return;
    compress(found.index + found.count, lane + static_cast<int32_t>(n), above);
    found.count += compress(found.value + found.count, x, above);
  };
  int64_t n = first;
  for (; n + kWidth <= N && found.count < found.room; n += kWidth) visit(n, All{});
  if (n < N && n + kWidth > N && found.count < found.room) visit(n, First{static_cast<int>(N - n)}), n = N;
  found.poison += sum(poison);
  return n;
}

int64_t find_above(const float* s, const float* bias, int64_t first, int64_t N, float threshold, Candidates* found) {
  if (bias == nullptr) {
    return find_above([=](int64_t n, auto lanes) { return load(s + n, lanes); }, first, N, threshold, *found);
  }
  auto sum_of = [=](int64_t n, auto lanes) { return load(s + n, lanes) + load(bias + n, lanes); };
  return find_above(sum_of, first, N, threshold, *found);
}
