"""Linear classifiers on word counts: the one-step models that two-phase training has to beat."""

from typing import Self, Sequence

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import LinearSVC

from llm import blas

# C, the inverse of the regularisation: the choices of the search.
STRENGTHS = (0.1, 1.0, 10.0, 100.0)
# Of a model that is not searched: its strength, and bounds, so that it takes seconds.
STRENGTH = 10.0
MOST_TEXTS = 20_000
MOST_FEATURES = 50_000
MOST_CHARACTERS = 5_000

# Texts and their labels, the numbers of the classes.
Labelled = tuple[Sequence[str], np.ndarray]


class NBSVM:
  """Linear SVM on naive-Bayes features (Wang and Manning 2012, section 2.3), for two classes.

  Binary counts of words and word pairs are scaled by their log-count ratio r. The weights of the
  SVM are interpolated with their mean magnitude by beta, 0.25 as published.
  """

  def __init__(self, strength: float, beta: float = 0.25):
    self.strength = strength
    self.beta = beta

  def fit(self, texts: Sequence[str], labels: np.ndarray) -> Self:
    """labels: 0 or 1 for each text."""
    self.vectorizer = CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=r"\w+|[^\w\s]")
    counts = scipy.sparse.csr_matrix(self.vectorizer.fit_transform(texts))
    labels = np.asarray(labels)
    positive = np.asarray(counts[labels == 1].sum(0)).ravel() + 1.0
    negative = np.asarray(counts[labels == 0].sum(0)).ravel() + 1.0
    self.ratio = np.log(positive / positive.sum()) - np.log(negative / negative.sum())
    svm = LinearSVC(C=self.strength).fit(counts.multiply(self.ratio).tocsr(), labels)
    weights = svm.coef_[0]
    self.weights = (1 - self.beta) * np.abs(weights).mean() + self.beta * weights
    self.bias = np.asarray(svm.intercept_)[0] * self.beta
    return self

  def predict(self, texts: Sequence[str]) -> np.ndarray:
    """0 or 1 for each text."""
    counts = scipy.sparse.csr_matrix(self.vectorizer.transform(texts))
    scores = counts.multiply(self.ratio).tocsr() @ self.weights + self.bias
    return (scores > 0).astype(int)


def tfidf_lr(strength: float, most_features: int | None = None) -> Pipeline:
  """Logistic regression on TF-IDF of words and word pairs, the commonest ones if there are more."""
  return make_pipeline(
    TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=most_features),
    LogisticRegression(C=strength, max_iter=1000),
  )


MODELS = {"tfidf_lr": tfidf_lr, "nbsvm": NBSVM}


def accuracy(name: str, strength: float, train: Labelled, held_out: Labelled) -> float:
  """The accuracy on `held_out` of the model `name` of MODELS, fitted to `train`."""
  with blas.one_thread():
    model = MODELS[name](strength).fit(*train)
  texts, labels = held_out
  return float((model.predict(texts) == labels).mean())


def baseline_accuracy(train: Labelled, held_out: Labelled) -> float | None:
  """The accuracy of `tfidf_lr` without a search, fitted to a sample of large data.

  None where it cannot be fitted: the texts have no words, or one class alone.
  """
  sample = np.random.default_rng(0).permutation(len(train[0]))[:MOST_TEXTS]
  texts = [train[0][i][:MOST_CHARACTERS] for i in sample]
  model = tfidf_lr(STRENGTH, MOST_FEATURES)
  try:
    with blas.one_thread():
      model.fit(texts, train[1][sample])
  except ValueError:
    return None
  cut = [text[:MOST_CHARACTERS] for text in held_out[0]]
  return float((model.predict(cut) == held_out[1]).mean())
